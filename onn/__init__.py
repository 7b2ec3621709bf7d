"""`onn`: pure functions for networks of very many, very small experts."""
