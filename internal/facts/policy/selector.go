package policy

import (
	"slices"
	"strings"
)

// Selector selects by labels: all of its requirements have to be met. The zero value selects everything.
type Selector []Requirement

// Operator is what a requirement asks of a label's value, as in the API's matchExpressions.
type Operator string

// The operators.
const (
	In           Operator = "In"
	NotIn        Operator = "NotIn" // or there is no such label
	Exists       Operator = "Exists"
	DoesNotExist Operator = "DoesNotExist"
)

// Requirement is met by labels of which one, of this key, is as the operator says.
type Requirement struct {
	Key string
	Operator
	Values []string
}

// Matches says whether these labels are selected.
func (s Selector) Matches(labels map[string]string) bool {
	return !slices.ContainsFunc(s, func(r Requirement) bool { return !r.met(labels) })
}

func (r Requirement) met(labels map[string]string) bool {
	value, there := labels[r.Key]
	switch r.Operator {
	case In:
		return there && slices.Contains(r.Values, value)
	case NotIn:
		return !there || !slices.Contains(r.Values, value)
	case Exists:
		return there
	case DoesNotExist:
		return !there
	}
	return false
}

// String returns the selector as kubectl takes it, "app=web,!canary", with requirements and values in order; "*" selects
// everything.
func (s Selector) String() string {
	if len(s) == 0 {
		return "*"
	}
	var parts []string
	for _, r := range s {
		values := strings.Join(slices.Sorted(slices.Values(r.Values)), ",")
		switch {
		case r.Operator == Exists:
			parts = append(parts, r.Key)
		case r.Operator == DoesNotExist:
			parts = append(parts, "!"+r.Key)
		case r.Operator == In && len(r.Values) == 1:
			parts = append(parts, r.Key+"="+values)
		case r.Operator == In:
			parts = append(parts, r.Key+" in ("+values+")")
		default:
			parts = append(parts, r.Key+" notin ("+values+")")
		}
	}
	slices.Sort(parts)
	return strings.Join(slices.Compact(parts), ",")
}
