"""What a compile did, and what to do about it: quality, progress, dumps and the tools on them.

    DumpReader(path, model_folder=None)    dump_reader.py   a dump, checked as it is read
    run_stage(reader, limit) -> RunResult  replay.py        run the graph as it was after a pass
    bisect(reader, floor_db) -> BisectResult  bisect.py     the first pass and rewrite that did it

Results are pydantic models; `render()` gives them as text, `model_dump_json()` as JSON.
"""
