"""The ground floor: knowledge bases, what they promise (`base`), and what can go wrong with them (`errors`).

    passages, jsonl     texts, read when asked for          corpus    a folder of passages, embeddings and questions
    encoder             text to vector                      cache     the documents a session has already met
    dense               exact inner product over vectors    padded    the same, made as costly as a larger corpus
    ranking             the one order of documents          latency   the same, answering in a set time

Nothing is imported here: each module loads its heavy packages only where it uses them.
"""
