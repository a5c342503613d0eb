"""The mathematics: tensors in, tensors out. Imports torch and itself only."""
