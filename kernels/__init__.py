"""The token-space operations as fused Triton kernels. Installed as `lora_lite.kernels`, never as `kernels`."""

if __name__ == "kernels":  # found through a working directory: the name belongs to the Hub's package
    raise ModuleNotFoundError(
        "this folder is lora_lite.kernels; the Hub's `kernels` package is not installed", name="kernels"
    )
