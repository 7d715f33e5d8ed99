"""A model behind HTTP: the requests of trainers, rankers and people, gathered into packs. Needs `lightrm[serve]`.

Starlette routes, uvicorn listens, pydantic checks, prometheus-client counts. Nothing here knows tokens or layers.
"""
