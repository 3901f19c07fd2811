"""Builds the kernels of `cpu_native`. Without a compiler the package installs all the same, and says so when asked."""

from glob import glob

from setuptools import Extension, setup

HERE = "src/autoround_backends/native"

setup(
    ext_modules=[
        Extension(
            "autoround_backends._native",
            [f"{HERE}/library.c"],
            depends=glob(f"{HERE}/*.h"),
            extra_compile_args=["-O3", "-std=c11", "-g0"],
            optional=True,
        )
    ]
)
