"""The spine: contracts and mathematics that three organs or more share."""
