"""Drawing charts into files, without a display."""


def load_pyplot():
    """Import matplotlib's drawing functions; ValueError says how to install them."""
    try:
        import matplotlib as mpl  # an extra: only reports draw charts
    except ImportError as error:
        raise ValueError("Reports are drawn with matplotlib: pip install 'hovle[demo]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
