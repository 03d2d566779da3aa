"""The lab's images: glyphs, looks, scenes, textures, and the tasks that are made of them."""
