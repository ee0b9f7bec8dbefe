"""carina: from unlabelled chest X-rays to a published, honestly evaluated backbone."""

__version__ = "0.2.0"
