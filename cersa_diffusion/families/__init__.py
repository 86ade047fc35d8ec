"""The families of pipelines that can be trained, one file each. `names` and `base` work without diffusers."""
