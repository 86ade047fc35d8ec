"""`cersa doctor`: what is installed here, what works, and what to do about the rest.

A package of its own, on the standard library and packaging alone: importing cersa_diffusion imports torch, transformers and
diffusers, and a broken one of these is what the doctor is called for.
"""
