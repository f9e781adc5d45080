"""Other libraries' models and trainers. Each module needs its library; none is imported with fastvae.

pythae.py       a pythae model's networks in a fastvae model
lightning.py    any fastvae model as a LightningModule
pytorch_ood.py  the outlier scores as detectors
"""
