"""What a model costs under secure multi-party computation, measured in SecretFlow SPU: a plug-in of Normfree.

In Python: :func:`normfree_private.costs.measure_private_costs`, then :func:`normfree_private.page.write_page`.
"""
