"""Models that transformers wrote: their folders, their processors, their modules."""
