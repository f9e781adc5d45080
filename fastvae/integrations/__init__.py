"""Other libraries' models and trainers. Each module needs its library; none is imported with fastvae.

pytorch_ood.py  the outlier scores as detectors
"""
