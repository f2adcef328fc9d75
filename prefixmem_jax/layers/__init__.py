"""Building blocks of transformers: attention and layers, for decoders and SID encoders alike."""
