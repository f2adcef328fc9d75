"""The decoder, and the decoder with a SID encoder attached."""
