"""Samplers: from noise to images, down a list of noise levels, along dx/ds = (x - D(x, s)) / s.

Each is a generator `(denoise, x, sigmas, noise, *, options)` that yields x after every step. `sigmas` is strictly
monotone; it usually falls to 0, may end above 0, and rises when an image is inverted. `noise(s, s_next)` has unit
variance. A step to 0 is always of first order: what is left is the denoiser's own answer.
"""
