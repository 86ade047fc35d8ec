"""The tabs of the page: components and their events. What they do is in the modules above."""
