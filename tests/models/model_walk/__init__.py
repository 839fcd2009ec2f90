"""The walk over transformers' models: each is built small, captured and rewritten, and what became of it recorded."""
