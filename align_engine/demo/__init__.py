"""The demo: data the project makes itself, with a checker, and a model small enough for two CPU cores."""

from align_engine.demo.make import make_demo
from align_engine.demo.task import check

__all__ = ["check", "make_demo"]
