package nft

import "errors"

// Kernel is the nftables of a network namespace: a Conn, or a Fake.
type Kernel interface {
	// Generation is the number of the rule set, which each transaction raises by one, whoever's it is.
	Generation() (uint32, error)
	// Commit makes all changes of a transaction, or none.
	Commit(Transaction) error
	// HasSets says whether the table is there, with the sets that it should have and no others.
	HasSets(Table) (bool, error)
	// HasChains says whether the table has these chains, with these rules, and no others.
	HasChains(table string, chains []Chain) (bool, error)
	// Each hands over the elements of a set. The error is errStrange if there is no such set.
	Each(table string, s *Set, yield func(Element)) error
	// Find looks for one element by its key. It cannot in a set of intervals whose key has one field.
	Find(table string, s *Set, e Element) (Element, bool, error)
	// Beside opens the same rule set once more, for another goroutine.
	Beside() (Kernel, error)
	Close()
}

// Transaction is changes of one table, in the order in which the fields stand.
type Transaction struct {
	Table string
	// Delete takes the table away, if it is there, and Make makes it, without Make.Elements.
	Delete bool
	Make   *Table
	Chains []Chain // that come
	Filled []Chain // that are there, and get other rules
	// What goes is removed first, since what comes may have its key: all becomes true at once.
	Remove, Add []Elements
	Gone        []string // chains
}

// Elements are some of a set.
type Elements struct {
	Set  *Set
	List []Element
}

// errStrange says that a table is not as we make them: it is replaced.
var errStrange = errors.New("the table is not as it should be")

// isNot leaves out the error that says that the table is not as it should be.
func isNot(strange error) error {
	if errors.Is(strange, errStrange) {
		return nil
	}
	return strange
}
