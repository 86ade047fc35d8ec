"""`cersa doctor`: reports what is installed, what works, and how to repair the rest.

It is a separate package that needs only the standard library and packaging: cersa_diffusion imports torch, transformers and
diffusers, and the doctor must also run when one of them is broken.
"""
