"""The library: masked-diffusion language models of the LLaDA family, from tokens to answers.

`import llada_core` registers the LLaDA classes with transformers' Auto classes as soon as transformers is imported
through it; it loads nothing heavy before a name is used.
"""
