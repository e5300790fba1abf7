"""The token-space operations as fused Triton kernels. Installed as `lora_lite.kernels`, never as `kernels`.

Python started in the repository's root finds this folder under the name `kernels`, which belongs to the Hub's package
that transformers and bitsandbytes look for. It then steps aside: for that package where it is installed, and otherwise
by having no `__file__`, as a namespace package, which transformers knows to be no installation.
"""

if __name__ == "kernels":
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if os.path.abspath(entry) != root])
    if spec is None or spec.loader is None:
        __file__ = None
    else:
        sys.modules[__name__] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[__name__])
