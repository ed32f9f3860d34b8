"""What a cascade can ask about an image: engines, Python functions, sign reading, a VLM."""
