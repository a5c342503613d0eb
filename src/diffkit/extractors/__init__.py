"""Feature extractors: networks that turn images into numbers that can be compared."""
