"""The OpenAI-compatible server: what may be asked (schema), how it is answered (answers), over HTTP (http)."""
