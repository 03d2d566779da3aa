"""The embedded miniature: eight small image tasks, a small vision transformer, and how it was pre-trained."""
