"""What joins the two sides: the command line, the simulation and the provisioning of a federation."""
