"""The tabs of the page: components and their events. Their functions use the modules of the folder above."""
