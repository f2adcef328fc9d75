"""From a model and a catalogue to ranked SIDs: prefill, beam search, sampling."""
