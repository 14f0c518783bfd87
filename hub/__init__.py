"""bitkern in the kernel format of Hugging Face: see README.md in this folder."""
