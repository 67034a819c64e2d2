package bgpconf

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// Community is a mark on a route that routers' policies look at: a standard one of two numbers (RFC 1997), or a
// large one of three (RFC 8092).
type Community struct {
	Large  bool
	Values [3]uint32 // of a standard one the first two
}

// wellKnown are those with a name in RFC 1997 and RFC 7999.
var wellKnown = map[string]Community{
	"no-export":           {Values: [3]uint32{0xffff, 0xff01}},
	"no-advertise":        {Values: [3]uint32{0xffff, 0xff02}},
	"no-export-subconfed": {Values: [3]uint32{0xffff, 0xff03}},
	"blackhole":           {Values: [3]uint32{0xffff, 666}},
}

// ParseCommunity reads 64512:100, 64512:1:2 or the name of a well-known one.
func ParseCommunity(s string) (Community, error) {
	if c, known := wellKnown[s]; known {
		return c, nil
	}
	words := strings.Split(s, ":")
	c, bits := Community{Large: len(words) == 3}, 16
	if c.Large {
		bits = 32
	}
	ok := len(words) == 2 || c.Large
	for i, w := range words {
		if !ok {
			break
		}
		v, err := strconv.ParseUint(w, 10, bits)
		ok = err == nil && w[0] != '+'
		c.Values[i] = uint32(v)
	}
	if !ok {
		return Community{}, fmt.Errorf("community %q: want something like 64512:100, 64512:1:100 or no-export", s)
	}
	return c, nil
}

// Standard returns a standard community as it is sent.
func (c Community) Standard() uint32 { return c.Values[0]<<16 | c.Values[1] }

func (c Community) String() string {
	if c.Large {
		return fmt.Sprintf("%d:%d:%d", c.Values[0], c.Values[1], c.Values[2])
	}
	return fmt.Sprintf("%d:%d", c.Values[0], c.Values[1])
}

func (c Community) compare(d Community) int {
	if c.Large != d.Large {
		if c.Large {
			return 1
		}
		return -1
	}
	return cmp.Or(cmp.Compare(c.Values[0], d.Values[0]), cmp.Compare(c.Values[1], d.Values[1]), cmp.Compare(c.Values[2], d.Values[2]))
}
