"""Dataset sources: where `diffkit prepare` reads images from."""
