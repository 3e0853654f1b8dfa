"""Keys, certificates, kits and database roles, and the files that hold them."""
