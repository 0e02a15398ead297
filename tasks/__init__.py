"""What each stage does, and how it is launched, followed, remembered and registered.

Every stage is a plain program (`python -m tasks.STAGE`) that needs neither Prefect nor a server. Heavy packages are
imported where they are used, so that asking whether there is anything to do stays cheap.
"""
