"""The mesa layer, MesaNet, and the tasks they are measured on."""
