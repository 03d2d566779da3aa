"""The paper's claims, tested on a study's rows."""
