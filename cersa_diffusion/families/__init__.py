"""The families of pipelines that can be trained, one file each. Only `names` and `base` can be imported without diffusers."""
