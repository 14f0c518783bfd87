"""The layers and blocks of other libraries, with the kernels of this one.

One module per library, imported only where the library already is. Each class is a subclass of the
one it takes the place of, with its name, so that ``isinstance``, pickling, and whatever goes by
class names work on. :func:`bitkern.convert` assigns it to ``module.__class__``.

``LAYERS`` and ``BLOCKS`` of each module map the library's classes to these; a value may also be a
function of the module. A block has a ``fits(module)``: what is wanted of the converted inside.
"""
