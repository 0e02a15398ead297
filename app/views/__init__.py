"""The views of the page, one file each: components and what they call. All logic is elsewhere."""
