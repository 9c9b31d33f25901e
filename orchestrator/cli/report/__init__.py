"""What commands show people: tables, charts, pages."""
