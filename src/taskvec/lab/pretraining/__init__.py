"""How the lab's encoders were pre-trained: the corpus, four objectives, and the runs."""
