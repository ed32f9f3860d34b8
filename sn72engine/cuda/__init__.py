"""The CUDA kernels of the cascade: find a driver, load the kernels, lay out their arguments.

Nothing here touches CUDA when imported. :func:`~sn72engine.cuda.driver.driver_available` says
whether there is a usable GPU, :func:`~sn72engine.cuda.kernels.load_kernels` loads the kernels, and
:mod:`~sn72engine.cuda.layout` describes each launch.
"""
