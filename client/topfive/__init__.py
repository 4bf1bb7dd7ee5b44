"""topfive: an image in, five labels out. The SDK, and the light kernel that every other part may import."""
