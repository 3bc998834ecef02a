"""What runs on a GPU alone; nothing of it is imported where PyTorch came without Triton."""
