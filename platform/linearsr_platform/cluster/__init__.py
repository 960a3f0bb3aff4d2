"""Ray: the session, the progress board, trainers and parallel experts. The only package that imports Ray."""
