"""What charts and tables are about; training and test share no word of it."""

from collections.abc import Mapping
from types import MappingProxyType

GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "train": MappingProxyType(
            {
                "fruit": ("Apples", "Pears", "Bananas", "Cherries", "Grapes", "Lemons", "Plums", "Kiwis", "Mangos"),
                "animal": ("Dogs", "Cats", "Horses", "Cows", "Sheep", "Ducks", "Rabbits", "Goats", "Pigs"),
                "country": (
                    "France",
                    "Spain",
                    "Italy",
                    "Japan",
                    "China",
                    "India",
                    "Brazil",
                    "Kenya",
                    "Canada",
                    "Peru",
                ),
                "city": ("London", "Paris", "Rome", "Berlin", "Madrid", "Tokyo", "Cairo", "Lima", "Oslo", "Delhi"),
                "sport": ("Tennis", "Soccer", "Hockey", "Rugby", "Golf", "Boxing", "Judo", "Rowing", "Chess"),
                "color": ("Red", "Blue", "Green", "White", "Black", "Yellow", "Pink", "Brown", "Gray"),
                "drink": ("Coffee", "Tea", "Milk", "Water", "Juice", "Cocoa", "Cider", "Soda", "Lemonade"),
                "subject": ("Math", "Music", "Art", "History", "Biology", "Physics", "Latin", "English", "Drama"),
                "vehicle": ("Car", "Bus", "Train", "Bike", "Truck", "Plane", "Ship", "Tram", "Van", "Taxi"),
                "person": ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack", "Kate"),
                "room": ("Kitchen", "Bedroom", "Bath", "Hall", "Cellar", "Attic", "Office", "Garage", "Study"),
                "shop": ("Bakery", "Butcher", "Florist", "Market", "Grocer", "Chemist", "Jeweler", "Tailor"),
                "tool": ("Hammer", "Saw", "Drill", "Pliers", "Chisel", "Wrench", "Plane", "Axe", "File"),
                "material": ("Wood", "Steel", "Glass", "Paper", "Stone", "Cotton", "Wool", "Leather", "Brick"),
                "product": ("Phone", "Laptop", "Tablet", "Camera", "Printer", "Radio", "Watch", "Lamp", "Fan"),
                "department": ("Sales", "Design", "Legal", "Finance", "Support", "Research", "Press", "Staff"),
                "team": ("Lions", "Eagles", "Sharks", "Tigers", "Wolves", "Hawks", "Bears", "Giants"),
                "region": ("North", "South", "East", "West", "Center", "Coast", "Hills", "Plains", "Islands"),
                "grade": ("A", "B", "C", "D", "E", "F"),
            }
        ),
        "test": MappingProxyType(
            {
                "vegetable": ("Carrots", "Onions", "Beans", "Leeks", "Peas", "Potatoes", "Cabbage", "Spinach"),
                "bird": ("Robins", "Owls", "Swans", "Crows", "Storks", "Finches", "Gulls", "Herons"),
                "river": ("Danube", "Rhine", "Nile", "Amazon", "Volga", "Thames", "Loire", "Ganges"),
                "planet": ("Mars", "Venus", "Saturn", "Jupiter", "Neptune", "Mercury", "Uranus", "Earth"),
                "tree": ("Oak", "Maple", "Birch", "Pine", "Willow", "Beech", "Cedar", "Elm"),
                "instrument": ("Violin", "Flute", "Piano", "Guitar", "Cello", "Harp", "Organ", "Oboe"),
                "dessert": ("Cake", "Pudding", "Pie", "Sorbet", "Waffles", "Custard", "Cookies", "Fudge"),
                "job": ("Nurse", "Pilot", "Farmer", "Teacher", "Baker", "Painter", "Lawyer", "Miner"),
                "guest": ("Laura", "Martin", "Nora", "Oscar", "Paula", "Ruth", "Simon", "Tina", "Victor", "Wendy"),
                "state": ("Texas", "Ohio", "Utah", "Maine", "Iowa", "Nevada", "Oregon", "Kansas"),
                "cloth": ("Shirt", "Skirt", "Socks", "Coat", "Gloves", "Scarf", "Boots", "Jeans"),
                "metal": ("Gold", "Silver", "Copper", "Zinc", "Tin", "Iron", "Lead", "Nickel"),
            }
        ),
    }
)
"""Part -> what is compared -> names of it, each group's own within a part."""

MEASURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "train": (
            "Sales", "Votes", "Visitors", "Points", "Orders", "Members", "Profit", "Costs", "Hours", "Weight", "Price",
            "Stock", "Rooms", "Calls", "Errors", "Views", "Users", "Speed", "Height", "Age", "Score", "Rain",
        ),
        "test": (
            "Income", "Guests", "Tickets", "Output", "Demand", "Repairs", "Length", "Jobs", "Deaths", "Exports",
            "Loans", "Energy",
        ),
    }
)  # fmt: skip
"""What is measured."""

PERIODS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "train": MappingProxyType(
            {
                "month": ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"),
                "weekday": ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"),
                "year": tuple(str(year) for year in range(1990, 2010)),
            }
        ),
        "test": MappingProxyType(
            {
                "year": tuple(str(year) for year in range(2010, 2030)),
                "week": tuple(f"W{number}" for number in range(1, 13)),
                "hour": ("6 am", "7 am", "8 am", "9 am", "10 am", "11 am", "1 pm", "2 pm", "3 pm", "4 pm", "5 pm"),
            }
        ),
    }
)
"""Part -> period -> its names in order."""
