"""The ground floor: knowledge bases, what they promise (`base`), and what can go wrong with them (`errors`).

    passages, jsonl     texts, read when asked for          corpus      passages and embeddings in a data folder
    questions           question sets, for measuring        cache       the documents a session has already met
    encoder, dpr        text to vector                      vectors     how vectors are stored and opened
    ranking             the one order of documents          kernel      the one inner product
    dense               exact search over vectors           padded      the same, made as costly as a larger corpus
    codes, int8, flat   fast scans that propose candidates  proposals   what they owe to whoever scores these again
    drift               what a search proves of the next    retrying    any of them, asked again where it fails
    hnsw, hnsw_build    approximate search in a graph       ivf         approximate search in lists
    bm25, analyzer      sparse search, embedded             latency     any of them, answering in a set time
    lucene, lucene_index, forward, jvm                      sparse search by Lucene, in Java
    index               opens a retriever from a folder     datastore   a KNN-LM's entries, and retrievers over them
    manifest            what such folders say of themselves folder      makes one, and goes on after a kill
    index_build, index_parts, datastore_build, dense_parts  what goes into it
    lines, windows      a text by lines; its tokens in overlapping windows
    model_folder        a model's files, and their checksum
    faiss_file          reads what faiss has written        ragged      rows of different lengths

Nothing is imported here: each module loads its heavy packages only where it uses them.
"""
