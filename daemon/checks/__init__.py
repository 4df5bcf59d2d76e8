"""What ``hyperbell check`` says beyond the configuration: of this host, its images, this installation."""
