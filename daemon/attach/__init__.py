"""The other side of a configuration: what each virtual machine monitor must be told to attach the configured devices.

One module for each monitor; ``vmms`` lists them. ``request`` has what they share, ``commands`` the commands.
"""
